"""Who makes data: the vLLM engine, the sampler around it, the rewards. Imports system only."""
