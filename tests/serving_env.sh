#!/bin/sh
# Whether a server runs where there is no torch: a new environment with serving-requirements.txt alone.
#     tests/serving_env.sh [EXPORTED_FOLDER]
# Without a folder one is made with the python of .venv (or $PYTHON), which has torch.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
place=$(mktemp -d)
server=""
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$place"' EXIT

folder=${1:-$place/live}
if [ $# -eq 0 ]; then
    OMP_NUM_THREADS=1 PYTHONPATH="$root/src:$root/tests/reliability" "$python" -W ignore - "$folder" <<'PY'
import sys
from pathlib import Path
from support import write_export
write_export(Path(sys.argv[1]))
PY
fi

# a copy: building leaves files behind
mkdir "$place/source"
cp -r "$root/src" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$place/source"
"$python" -m venv "$place/venv"
pip="$place/venv/bin/python -m pip --disable-pip-version-check --quiet"
$pip install --no-deps -r "$root/serving-requirements.txt"
$pip check
$pip install --no-deps "$place/source"
echo "environment: $(du -sm "$place/venv" | cut -f1) MB"

cd "$place"  # not the root: what is imported must be what was installed
for name in torch numba ibis; do
    if "$place/venv/bin/python" -c "import $name" 2>/dev/null; then
        echo "$name must not be there"; exit 1
    fi
done
"$place/venv/bin/domlora" --help >/dev/null
"$place/venv/bin/domlora" serve --bundle "$folder" --name live --port 0 --drain 0 2>log &
server=$!
"$place/venv/bin/python" - <<'PY'
import json, time
import httpx
from domlora.client import Client

def told(name):
    found = [json.loads(line) for line in open("log")]
    return next((line for line in found if line["event"] == name), None)

until = time.monotonic() + 60
while not told("ready"):
    assert time.monotonic() < until, open("log").read()
    time.sleep(0.1)
url = told("listening")["url"]
with Client(url, model="live") as client:
    slots = client.metadata()["inputs"][0]["shape"][1]
    domain = client.adapters()[0].domain
    inferred = client.infer([[2] * slots] * 3, domain=domain)
    assert inferred.probability.shape == (3,) and inferred.adapter, inferred
    columns = httpx.get(f"{url}/v1/console/schema").json()["columns"]
    scored = client.score([{column["name"]: None for column in columns}], domain=domain, unit="u", explain=True)
    assert 0 < scored.probability[0] < 1, scored
for path in ("/console/", "/v1/console/overview", "/v1/console/experiments", "/metrics"):
    assert httpx.get(url + path).status_code == 200, path
print("it scores:", inferred.probability.tolist())
PY
kill -TERM "$server"
wait "$server"
server=""
echo "it ended well"
