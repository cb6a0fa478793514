# The demo's targets, included by the Makefile.

.PHONY: demo demo-baselines demo-eval demo-other-text demo-growing base-model

## Run the whole method on real text, up to runs/demo/report.html; goes on where it was interrupted.
demo: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/run.sh

## Do what else one could with the same tokens, for the demo's table.
demo-baselines: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/baselines.sh

## Run lm_eval on the demo's models: which of four endings continues a held-out passage?
demo-eval: $(INSTALLED)
ifndef SYSTEM_PYTHON
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
endif
	PYTHON=$(BIN)/python bash examples/demo/evaluate_choices.sh

## Try the demo's models on text of another program, fetched as a Debian package.
demo-other-text: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/other_text.sh

## Compare half of the demo's new experts, allocated by layer, with all of them.
demo-growing: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/growing.sh

## Make data/base_model again from a random initialisation, in runs/base_model/hf.
base-model: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/make_base_model.sh
