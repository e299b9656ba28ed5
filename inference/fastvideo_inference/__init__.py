"""What one does with a video model: requests, stages, the pipeline and its commands."""
