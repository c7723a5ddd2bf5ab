"""What every role of Understudy stands on: configuration, rpc, wire formats, metrics, client."""

__version__ = "0.1.0"
