"""What a run trains on: prompts, shards, samples of the teacher."""
