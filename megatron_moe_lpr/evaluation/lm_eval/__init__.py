"""The paper's benchmarks, run by lm_eval."""
