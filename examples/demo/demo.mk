# The demo's targets, included by the Makefile.

.PHONY: demo demo-full demo-baselines demo-eval demo-other-text demo-growing demo-mixture demo-vocabulary \
	demo-vocabulary-reviews demo-instruct paper-table paper-scaling base-model

## Run the whole method on real text, up to runs/demo/report.html; resumes if interrupted.
demo: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py demo

## Run the demo at the paper's proportions: the whole corpus once, a replay of less than 1% of it.
demo-full: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py full

## Reproduce the paper's Table 1 in small, with two seeds; ends in runs/paper/report.html.
paper-table: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py paper-table

## Add curves over the number of experts, the replay and the languages to that report.
paper-scaling: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py scaling

## Train the demo's baselines on the same tokens and add them to its table.
demo-baselines: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py baselines

## Run lm_eval on the demo's models: which of four endings continues a held-out passage?
demo-eval: $(INSTALLED)
ifndef SYSTEM_PYTHON
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
endif
	$(BIN)/python examples/demo/demo.py choices

## Evaluate the demo's models on another text, which is fetched as a Debian package.
demo-other-text: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py other-text

## Compare half of the demo's new experts, allocated by layer, with all of them.
demo-growing: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py growing

## Train a mixture base from the demo's corpus and extend it to the new languages.
demo-mixture: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py mixture

## Compare the demo with and without new tokens for the new languages, at equal bytes of text.
demo-vocabulary: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py vocabulary

## Compare reviews of the demo with new tokens, by what keeps probability from these in the original languages.
demo-vocabulary-reviews: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py vocabulary-reviews

## Make the demo's mixture answer questions in three ways: graft, fine-tuning, both.
demo-instruct: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py instruct

## Train data/base_model again from a random initialisation, in runs/base_model/hf.
base-model: $(INSTALLED)
	$(BIN)/python examples/demo/demo.py base-model
