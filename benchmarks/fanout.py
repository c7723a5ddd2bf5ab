"""Fan-out: how long until all replicas serve a version, by model, network, shape and number.

    publish: ranks diff, encode and digest; the store applies and verifies
    spread:  flat: every replica fetches from the store
             tree: the store feeds k nodes, each of which feeds k more once it has verified
    load:    the engine takes the verified weights over; generation stands still

A simulation with costs that `make bench-weights` measured on one core: no cluster was used. Links
are full duplex, the network between them is not a limit, a sender's link is shared evenly.

    {"bench": "fanout", "model": "7B", "gbit_per_s": 10, "replicas": 64, "payload": "delta",
     "shape": "tree", "fan_out": 8, "publish_s": ..., "spread_s": ..., "load_s": ..., "all_s": ...}

docs/scaling.md has the formula, which tests/test_fanout.py holds against the simulation.
"""

import argparse
import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

MODELS = {"7B": 7e9, "32B": 32e9, "1T": 1e12}
"""Parameters, of two bytes each."""
RANKS = {"7B": 8, "32B": 32, "1T": 1024}
"""Trainer ranks, each of which encodes its own shard."""
GBIT_PER_S = (1.0, 10.0, 100.0)
REPLICAS = (1, 8, 64, 1000)
FAN_OUTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STORE = 0
"""Index of the store among the nodes; replicas are 1 to n."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a core does in a second, in MB of bfloat16 weights unless said otherwise."""

    ratio: float = 124.0
    """Bytes of the weights for one of a delta."""
    encode: float = 1070.0
    """Diff, encode and digest, a rank."""
    copy: float = 6700.0
    """The base's values into the buffer, before a delta is applied."""
    apply: float = 4550.0
    """A delta to the buffer."""
    place: float = 6700.0
    """Values of a full copy into the buffer."""
    verify: float = 2900.0
    """Digests and finite values of the result."""
    load: float = 800.0
    """Into the engine, in the pause; of the CPU engine."""
    send: float = 780.0
    """Payload bytes that a process sends, whatever its link."""
    receive: float = 1440.0
    """Payload bytes that a process receives."""
    latency: float = 0.02
    """Seconds from a version's announcement until the first byte of its payload."""
    cores: int = 1
    """Cores at work on a node; a store and a replica use one today."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question."""

    num_bytes: float
    """Bytes of the weights."""
    ranks: int
    gbit_per_s: float
    replicas: int
    payload: str
    """`delta` or `full`."""
    fan_out: int
    """Children of a node; 0 for flat."""

    def wire_bytes(self, costs: Costs) -> float:
        """Bytes of the payload."""
        return self.num_bytes / (costs.ratio if self.payload == "delta" else 1.0)

    def send_rate(self, costs: Costs) -> float:
        """Bytes a second that a node sends at most."""
        return min(self.gbit_per_s * 1e9 / 8, costs.send * 1e6)

    def receive_rate(self, costs: Costs) -> float:
        """Bytes a second that a node receives at most."""
        return min(self.gbit_per_s * 1e9 / 8, costs.receive * 1e6)


def main() -> None:
    """Run every case, print its line, and a table at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in fields(Costs):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    arguments = vars(parser.parse_args())
    replicas = arguments.pop("replicas")
    costs = Costs(**arguments)
    print(json.dumps({"bench": "fanout", "costs": asdict(costs)}))
    lines = [line(model, case, costs) for model, case in cases(replicas, costs)]
    for each in lines:
        print(json.dumps(each))
    print("\n" + table(lines, replicas))


def cases(replicas: Sequence[int], costs: Costs) -> Iterator[tuple[str, Case]]:
    """All questions; trees have the fan-out that the formula finds best."""
    for model, parameters in MODELS.items():
        for gbit in GBIT_PER_S:
            for payload in ("delta", "full"):
                for number in replicas:
                    flat = Case(
                        num_bytes=2 * parameters,
                        ranks=RANKS[model],
                        gbit_per_s=gbit,
                        replicas=number,
                        payload=payload,
                        fan_out=0,
                    )
                    yield model, flat
                    yield model, best_tree(flat, costs)


def best_tree(flat: Case, costs: Costs) -> Case:
    """The tree that is done first."""
    trees = [replace(flat, fan_out=number) for number in FAN_OUTS]
    return min(trees, key=lambda case: spread_formula(case, costs))


def line(model: str, case: Case, costs: Costs) -> dict[str, object]:
    """A case as it is printed."""
    parts = {
        "publish_s": publish_seconds(case, costs),
        "spread_s": simulate_spread(case, costs),
        "load_s": case.num_bytes / costs.load / 1e6,
    }
    return {
        "bench": "fanout",
        "model": model,
        "gbit_per_s": case.gbit_per_s,
        "replicas": case.replicas,
        "payload": case.payload,
        "shape": "tree" if case.fan_out else "flat",
        "fan_out": case.fan_out or case.replicas,
        **{name: round(seconds, 2) for name, seconds in parts.items()},
        "all_s": round(sum(parts.values()), 2),
    }


def publish_seconds(case: Case, costs: Costs) -> float:
    """From the end of a step until the store announces the version.

    Ranks encode side by side and share the store's link; the store holds the head and applies to
    it in place.
    """
    shard = case.num_bytes / case.ranks / 1e6
    encode = shard / (costs.encode if case.payload == "delta" else costs.place)
    taken = costs.apply if case.payload == "delta" else costs.place
    store = case.num_bytes / 1e6 / costs.cores * (1 / taken + 1 / costs.verify)
    rate = min(case.ranks * case.send_rate(costs), case.receive_rate(costs))
    return encode + case.wire_bytes(costs) / rate + store


def apply_seconds(case: Case, costs: Costs) -> float:
    """A replica's work while the payload comes."""
    megabytes = case.num_bytes / 1e6 / costs.cores
    if case.payload == "delta":
        return megabytes / costs.copy + megabytes / costs.apply
    return megabytes / costs.place


def verify_seconds(case: Case, costs: Costs) -> float:
    """A replica's work behind the last byte."""
    return case.num_bytes / 1e6 / costs.cores / costs.verify


def spread_formula(case: Case, costs: Costs) -> float:
    """Seconds from the store's announcement until the last replica has verified.

    hop(c) = latency + max(c * wire_bytes / rate, apply) + verify
    flat:  hop(n)
    tree:  (L - 1) * hop(k) + hop(c),  L levels, c children of a node above the last level
    """

    def hop(children: int) -> float:
        seconds_a_byte = max(children / case.send_rate(costs), 1 / case.receive_rate(costs))
        sending = case.wire_bytes(costs) * seconds_a_byte
        return (
            costs.latency + max(sending, apply_seconds(case, costs)) + verify_seconds(case, costs)
        )

    if not case.fan_out:
        return hop(case.replicas)
    seconds, left, parents = 0.0, case.replicas, 1
    while left > parents * case.fan_out:
        seconds += hop(case.fan_out)
        parents *= case.fan_out
        left -= parents
    return seconds + hop(-(-left // parents))


def parents_of(replicas: int, fan_out: int) -> list[int]:
    """The node that each replica fetches from; levels are full but the last, which is even."""
    if not fan_out:
        return [STORE] * replicas
    parents: list[int] = []
    level = [STORE]
    while len(parents) < replicas:
        number = min(len(level) * fan_out, replicas - len(parents))
        first = len(parents) + 1
        parents += [level[index % len(level)] for index in range(number)]
        level = list(range(first, first + number))
    return parents


class SharedLink:
    """A sender's link: the transfers that are under way have equal shares of it.

    Args:
        rate: bytes a second of all transfers together.
        limit: bytes a second of one.
    """

    def __init__(self, rate: float, limit: float) -> None:
        self._rate = rate
        self._limit = limit
        self._now = 0.0
        self._share = 0.0
        """Bytes that a transfer had been sent by now, if it was there from the beginning."""
        self._ends: list[tuple[float, int]] = []
        """The share at which each transfer is done, and for whom."""

    def start(self, now: float, child: int, num_bytes: float) -> None:
        """Begin a transfer."""
        self._advance(now)
        heapq.heappush(self._ends, (self._share + num_bytes, child))

    def next_end(self) -> float | None:
        """When the next transfer ends if no other one begins before."""
        if not self._ends:
            return None
        return self._now + (self._ends[0][0] - self._share) / self._speed()

    def finish(self, now: float) -> int:
        """End the next transfer; returns whose it was."""
        self._advance(now)
        _, child = heapq.heappop(self._ends)
        return child

    def _advance(self, now: float) -> None:
        if self._ends:
            self._share += (now - self._now) * self._speed()
        self._now = now

    def _speed(self) -> float:
        return min(self._rate / len(self._ends), self._limit)


def simulate_spread(case: Case, costs: Costs) -> float:
    """The same as the formula, event by event."""
    children: dict[int, list[int]] = defaultdict(list)
    parents = parents_of(case.replicas, case.fan_out)
    for child, parent in enumerate(parents, 1):
        children[parent].append(child)
    rates = case.send_rate(costs), case.receive_rate(costs)
    links = [SharedLink(*rates) for _ in range(case.replicas + 1)]
    started: dict[int, float] = {}
    events: list[tuple[float, str, int]] = [(0.0, "verified", STORE)]
    last = 0.0
    while events:
        now, kind, node = heapq.heappop(events)
        if kind == "verified":
            last = max(last, now)
            events_of = [(now + costs.latency, "start", child) for child in children[node]]
        elif kind == "start":
            started[node] = now
            events_of = _restart(links, parents[node - 1], now, node, case.wire_bytes(costs))
        else:
            events_of = _end(links[node], node, now, started, case, costs)
        for event in events_of:
            heapq.heappush(events, event)
    return last


def _restart(
    links: Sequence[SharedLink], sender: int, now: float, child: int, num_bytes: float
) -> list[tuple[float, str, int]]:
    links[sender].start(now, child, num_bytes)
    end = links[sender].next_end()
    assert end is not None
    return [(end, "sent", sender)]


def _end(
    link: SharedLink, sender: int, now: float, started: dict[int, float], case: Case, costs: Costs
) -> list[tuple[float, str, int]]:
    """A transfer may have ended, unless others began since this was foretold."""
    end = link.next_end()
    if end is None or end > now + max(1e-9, 1e-12 * now):
        return []
    child = link.finish(now)
    applied = max(now, started[child] + apply_seconds(case, costs))
    events = [(applied + verify_seconds(case, costs), "verified", child)]
    following = link.next_end()
    return events if following is None else [*events, (following, "sent", sender)]


def table(lines: Sequence[dict[str, object]], replicas: Sequence[int]) -> str:
    """Seconds of `spread` for each model, network and payload: flat / tree (its fan-out)."""
    found = {
        (each["model"], each["gbit_per_s"], each["payload"], each["replicas"], each["shape"]): each
        for each in lines
    }
    rows = [
        "| model | Gbit/s | payload | publish | " + " | ".join(map(str, replicas)) + " | load |",
        "|---" * (5 + len(replicas)) + "|",
    ]
    for model, gbit, payload in dict.fromkeys(key[:3] for key in found):
        cells = []
        for number in replicas:
            flat, tree = (found[model, gbit, payload, number, shape] for shape in ("flat", "tree"))
            cell = f"{_seconds(flat)}"
            if number > 1:
                cell += f" / {_seconds(tree)} ({tree['fan_out']})"
            cells.append(cell)
        publish, load = (_short(flat[name]) for name in ("publish_s", "load_s"))
        rows.append(
            f"| {model} | {gbit:g} | {payload} | {publish} | {' | '.join(cells)} | {load} |"
        )
    return "\n".join(rows)


def _seconds(case: dict[str, object]) -> str:
    return _short(case["spread_s"])


def _short(seconds: object) -> str:
    assert isinstance(seconds, float)
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


if __name__ == "__main__":
    main()
