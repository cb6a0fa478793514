"""The paper's and other multilingual benchmarks, run by lm_eval."""
