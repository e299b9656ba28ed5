"""Jobs, queues and workers: clips made by several processes, none of which a job depends on."""
