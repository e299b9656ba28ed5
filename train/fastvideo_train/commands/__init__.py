"""The verbs of `fastvideo` that train: each module is one command."""
