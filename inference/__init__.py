"""Inference servers: batched generation under the newest policy they hold."""
