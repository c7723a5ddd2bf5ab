"""Suites that ship with the environment server."""
