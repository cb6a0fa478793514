# The real model's target, included by the Makefile.

.PHONY: real

# STAGE is one of base, tokenizer, moe-lpr, others, measure, report: what it needs is made first, if it is missing.
# QUICK=1 takes a few steps of each training, in runs/real-quick.
## Extend a real model (SmolLM2-135M) to three languages beside other methods, up to runs/real/report.html; resumes.
real: $(INSTALLED)
	$(BIN)/python -m examples.real.real $(STAGE)
