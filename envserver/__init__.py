"""Environment servers: suites of tasks, and one environment per session."""
