"""compose.yaml as processes on one machine: `python -m deploy.local`."""
