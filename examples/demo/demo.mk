# The demo's targets, included by the Makefile.

.PHONY: demo demo-baselines base-model

# The whole method on real text; ends in runs/demo/report.html. Goes on where it was interrupted.
demo: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/run.sh

# What else one could do with the same tokens, for the table.
demo-baselines: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/baselines.sh

# Remake data/base_model from a random initialisation, in runs/base_model/hf.
base-model: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/make_base_model.sh
