"""Messages and stubs of package understudy.v1, generated from protos/ at build."""
