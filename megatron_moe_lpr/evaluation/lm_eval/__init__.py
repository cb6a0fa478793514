"""The paper's benchmarks by lm_eval: which of its tasks there are for a language, and what came out."""
