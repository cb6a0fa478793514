# The demo's targets, included by the Makefile.

.PHONY: demo demo-full demo-baselines demo-eval demo-other-text demo-growing paper-table paper-scaling base-model

## Run the whole method on real text, up to runs/demo/report.html; resumes if interrupted.
demo: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/run.sh

## Run the demo at the paper's proportions: the whole corpus once, a replay of less than 1% of it.
demo-full: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/full.sh

## Reproduce the paper's Table 1 in small, with two seeds; ends in runs/paper/report.html.
paper-table: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/paper_table.sh

## Add curves over the number of experts, the replay and the languages to that report.
paper-scaling: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/scaling.sh

## Train the demo's baselines on the same tokens and add them to its table.
demo-baselines: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/baselines.sh

## Run lm_eval on the demo's models: which of four endings continues a held-out passage?
demo-eval: $(INSTALLED)
ifndef SYSTEM_PYTHON
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
endif
	PYTHON=$(BIN)/python bash examples/demo/evaluate_choices.sh

## Evaluate the demo's models on another text, which is fetched as a Debian package.
demo-other-text: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/other_text.sh

## Compare half of the demo's new experts, allocated by layer, with all of them.
demo-growing: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/growing.sh

## Train data/base_model again from a random initialisation, in runs/base_model/hf.
base-model: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/demo/make_base_model.sh
