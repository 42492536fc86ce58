"""Control of how much to draft: pauses, the size of trees, timings and acceptance rates."""
