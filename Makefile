# make train: set everything up, and train a small model on the embedded dataset, within minutes on two CPU cores.
# make test:  set everything up, and run the linter, the type checker and the tests.
# make test-fast: what of it takes less than two minutes on two CPU cores, from units of each kind to a short training.
# pip has --no-compile, because Python compiles the few modules that it imports by itself.

VENV ?= .venv
# The first Python that is new enough. Each is tried, since a version manager may have commands without an installation.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

train: $(VENV)/train
	$(VENV)/bin/python train.py --config configs/debug.yml
	@echo "This small model shows that everything works: it draws blurred digits and forgets them within some frames."
	@echo "See one that was trained for hours: $(VENV)/bin/python eval.py --logdir pretrained --num_examples 4"

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations=5

FAST = $(addprefix tests/, test_config.py test_data.py test_tools.py test_record.py test_readme.py fast/test_scan.py \
	fast/test_initial.py sequences/test_noise.py metrics/test_similarity.py training/test_runs.py system/test_logs.py \
	report/test_report.py analyses/test_compare.py \
	$(addprefix test_cwvae.py::, test_cwvae_equals_the_textbook_form_in_single_precision test_nll_equals_scipy \
	test_kl_divergence_and_entropy_equal_sampled_estimates test_states_do_not_depend_on_later_frames) \
	test_train.py::test_training_is_repeatable_and_resumes_exactly \
	test_eval.py::test_an_evaluation_writes_frames_curves_and_metrics)

test-fast: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(FAST)

$(VENV)/train: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test: tests/requirements.txt $(VENV)/train
	$(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: train lint test test-fast
