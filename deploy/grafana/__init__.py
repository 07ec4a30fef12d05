"""Grafana: what it is provisioned with. `python -m deploy.grafana` writes the dashboards."""
