"""The trainer: FSDP2 ranks that learn from demonstrations, then from batches of the intake.

main.py           entry point, one process a rank
supervised.py     warm-up on demonstrations          reinforce.py   RL: batch, update, publish
conversations.py  chat -> tokens and loss mask       experience.py  batch -> tokens, advantages
microbatches.py   sequences of like length together  update.py      one batch's update
model.py          the policy as an FSDP2 module      losses/        one pure function a file
logprobs.py       chosen tokens' log-probabilities   advantages.py  rewards -> advantages
optimizer.py      AdamW, schedules, clipping         report.py      what a step measured
checkpoints/      saved beside the loop, resumed     model_folder.py  save for Hugging Face
ranks.py          process group and collectives      publish.py     weights to the store
scratch.py        a small model from nothing         shards.py      shard -> checkpoint slices
tokenizer.py      its tokenizer                      intake_client.py, calls.py   gRPC
"""
