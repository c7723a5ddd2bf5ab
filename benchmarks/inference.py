"""What serving generation over gRPC costs: tokens/s through Generate against the engine itself.

    python -m benchmarks.inference

One vLLM engine, one model, the same requests on two ways: called in the server's process, and by a
client in a process of its own over loopback, through the whole servicer (checks, admission,
metrics). Rounds alternate, so that both ways meet the same machine; the first round of each is not
counted, and of the others each way's median counts. Reply lengths differ from request to request,
as they do in practice, and are the same on both ways; prompts are always new, so that nothing is
cached. On two cores the client competes with the server for the core that the engine leaves, as an
actor on the same machine would.

Prints one JSON line a case: {"bench": "inference", "concurrency": 16, "tokens_per_s": ...,
"in_process_tokens_per_s": ..., "ratio": ...}; the target is a ratio of at least 0.95.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import uvloop

from inference.engine import GenerationRequest
from inference.servicer import InferenceServicer
from inference.vllm_engine import VllmEngine
from inference.weights import Shadow
from understudy.client import InferenceClient
from understudy.config import InferenceConfig, ModelConfig, NetworkConfig
from understudy.process import prepare_process
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.trajectory import IntArray
from understudy.v1 import common_pb2, inference_pb2_grpc
from understudy.weights.layout import plan_layout

CONCURRENCIES = (16, 64)
REQUESTS_PER_SLOT = 6
PROMPT_TOKENS = 96
MIN_REPLY_TOKENS, MAX_REPLY_TOKENS = 16, 80
VOCAB_SIZE = 2048
Generate = Callable[[IntArray, int], Awaitable[int]]


def main() -> None:
    """Measure all cases, or be the client of one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="counted rounds of each way")
    parser.add_argument("--client", metavar="ADDRESS", help="drive this server (internal)")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    if arguments.client:
        uvloop.run(run_client(arguments.client))
    else:
        uvloop.run(run_server(arguments.rounds))


async def run_server(num_rounds: int) -> None:
    """Host the engine and measure both ways in turn."""
    config = InferenceConfig(max_model_len=512, max_running=64)
    control = RoleControl("inference")
    engine = await start_engine(config)
    service = Service(
        name="understudy.v1.InferenceService",
        add=inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        servicer=InferenceServicer(engine, config, control),
    )
    server = RoleServer("inference", "127.0.0.1:0", NetworkConfig(), [service], control)
    port = await server.bind()
    await server.set_serving()
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.inference", "--client", f"127.0.0.1:{port}",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert client.stdin
    assert client.stdout

    async def generate(prompt: IntArray, max_new_tokens: int) -> int:
        request = GenerationRequest(
            request_id=f"in-process-{time.monotonic_ns()}",
            prompt_token_ids=prompt,
            temperature=1.0,
            max_new_tokens=max_new_tokens,
        )
        return len((await engine.generate(request)).token_ids)

    for concurrency in CONCURRENCIES:
        served, in_process = [], []
        for seed in range(num_rounds + 1):
            client.stdin.write(f"{concurrency} {seed}\n".encode())
            served.append(float(await client.stdout.readline()))
            in_process.append(await measure_round(generate, concurrency, seed + 1000))
        report(concurrency, statistics.median(served[1:]), statistics.median(in_process[1:]))
    client.stdin.close()
    await client.wait()
    await server.stop()
    await engine.stop()


async def run_client(address: str) -> None:
    """Drive rounds that are asked for on stdin; answer each with its tokens/s."""
    async with InferenceClient.connect(address) as client:

        async def generate(prompt: IntArray, max_new_tokens: int) -> int:
            sampling = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=max_new_tokens)
            return len((await client.generate(prompt, sampling)).token_ids)

        while line := await asyncio.to_thread(sys.stdin.readline):
            concurrency, seed = map(int, line.split())
            print(await measure_round(generate, concurrency, seed), flush=True)


async def measure_round(generate: Generate, concurrency: int, seed: int) -> float:
    """Tokens/s of `concurrency` slots that each ask for several replies, one after another."""
    shape = (concurrency, REQUESTS_PER_SLOT)
    prompts = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (*shape, PROMPT_TOKENS), np.int32)
    lengths = np.random.default_rng(0).integers(MIN_REPLY_TOKENS, MAX_REPLY_TOKENS + 1, shape)

    async def slot(index: int) -> int:
        calls = zip(prompts[index], lengths[index].tolist(), strict=True)
        return sum([await generate(prompt, length) for prompt, length in calls])

    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(slot(index) for index in range(concurrency))))
    return tokens / (time.perf_counter() - start)


def report(concurrency: int, served: float, in_process: float) -> None:
    """Print one case."""
    case = {
        "bench": "inference",
        "concurrency": concurrency,
        "tokens_per_s": round(served, 1),
        "in_process_tokens_per_s": round(in_process, 1),
        "ratio": round(served / in_process, 3),
    }
    print(json.dumps(case), flush=True)


async def start_engine(config: InferenceConfig) -> VllmEngine:
    """vLLM with a made-up Qwen3 of 0.9 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model_config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    tensors = Qwen3ForCausalLM(model_config).state_dict()
    del tensors["lm_head.weight"]
    shadow = Shadow(plan_layout((name, "F32", value.shape) for name, value in tensors.items()))
    for entry, data in shadow:
        data[:] = tensors[entry.name].float().numpy().reshape(-1).view(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        model_config.save_pretrained(folder)
        engine = VllmEngine(config, ModelConfig(path=Path(folder), dtype="float32"))
        await engine.start(Path(folder))
    await engine.load_weights(shadow, 1)
    return engine


if __name__ == "__main__":
    main()
