"""Prometheus and Grafana for a run, made from the metrics that the code declares."""
