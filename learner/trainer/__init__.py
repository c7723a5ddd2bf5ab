"""The trainer: FSDP2 ranks that learn from demonstrations, then from batches of the intake.

main.py           entry point, one process a rank
supervised.py     warm-up on demonstrations          reinforce.py   RL: batch, update, publish
conversations.py  chat -> tokens and loss mask       experience.py  batch -> tokens, advantages
packing.py        sequences end to end, no padding   update.py      one batch's updates
model.py          the policy as an FSDP2 module      algorithm.py   the configured loss
attention.py      within each sequence of a pack     losses/        its parts, one a file
logprobs.py       chosen tokens' log-probabilities   memory.py      batches that do not fit
optimizer.py      AdamW, schedules, clipping         report.py      what a step measured
checkpoints/      saved beside the loop, resumed     model_folder.py  save for Hugging Face
ranks.py          process group and collectives      publish.py     weights to the store
untrainable.py    a batch without finite gradients   probe.py       what replicas check by
scratch.py        a small model from nothing         shards.py      shard -> checkpoint slices
tokenizer.py      its tokenizer                      intake_client.py, calls.py   gRPC
"""
