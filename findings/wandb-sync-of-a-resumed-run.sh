#!/usr/bin/env bash
# wandb 0.31.0 (Python 3.12): what `wandb sync` makes of a run that was resumed offline, whose two directories have one id.
#
# Guess: the directory that is uploaded last replaces the history of the other (as reports of 2022 to 2025 say), and
# where steps overlap, those that come again are dropped, as in a run that resumes online.
#
# Seen: one call of `wandb sync` uploads the directories of a run in the order of their times and appends. A step that
# comes again isn't dropped: it and its successors are numbered on from the last one until the numbers fit again.
#     steps 1000 2000, then 3000 4000   ->   1000 2000 3000 4000
#     steps 1000 2000, then 2000 3000   ->   1000 2000 2001 3000
#     steps 1 2 3 4 5 6, then 5 6 7 20  ->   1 2 3 4 5 6 7 8 9 20
#
# The server is a stand-in on loopback that keeps what it is sent and reports a run's state in the public API's form;
# the numbers are changed on this side of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check wandb==0.31.0

cat >server.py <<'PYTHON'
"""Keeps the history of runs: {id: [line, ...]} in history.json."""
import gzip, http.server, json

runs = {}


def answer(query, given):
    name = given.get("name")
    lines = runs.get(name, [])
    project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
    if "upsertBucket" in query:
        bucket = {"id": f"b{name}", "name": name, "config": "{}", "historyLineCount": len(lines), "project": project}
        return {"upsertBucket": {"inserted": not lines, "bucket": bucket}}
    if "createRunFiles" in query:
        files = [{"name": file, "uploadUrl": f"http://127.0.0.1:{server.server_port}/file"} for file in given["files"]]
        return {"createRunFiles": {"runID": f"b{name}", "uploadHeaders": [], "files": files}}
    if "historyLineCount" in query:
        last = json.dumps(lines[-1]) if lines else "{}"
        bucket = {
            "id": f"b{name}", "name": name, "displayName": name, "config": "{}", "tags": [], "summaryMetrics": last,
            "historyLineCount": len(lines), "historyTail": json.dumps([last]), "logLineCount": 0,
            "eventsLineCount": 0, "eventsTail": '["{}"]', "wandbConfig": '{"t": 1}',
        }
        return {"model": {**project, "bucket": bucket if lines else None}}
    return {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self.path.endswith(("/graphql", "/file_stream")):
            self.reply({})
            return
        sent = json.loads(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        if self.path.endswith("/graphql"):
            self.reply({"data": answer(sent["query"], sent.get("variables") or {})})
            return
        history = (sent.get("files") or {}).get("wandb-history.jsonl")
        if history:
            lines = runs.setdefault(self.path.split("/")[-2], [])
            lines[history["offset"] :] = map(json.loads, history["content"])
            with open("history.json", "w") as file:
                json.dump(runs, file)
        self.reply({})

    def reply(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open("port", "w") as file:
    file.write(str(server.server_port))
server.serve_forever()
PYTHON

cat >log.py <<'PYTHON'
import sys, wandb

name, *steps = sys.argv[1:]
settings = wandb.Settings(silent=True)
with wandb.init(project="p", mode="offline", dir="runs", id=name, resume="allow", settings=settings) as run:
    for step in map(int, steps):
        run.log({"value": step}, step=step)
PYTHON

mkdir runs
venv/bin/python log.py apart 1000 2000
venv/bin/python log.py touching 1000 2000
venv/bin/python log.py overlapping 1 2 3 4 5 6
sleep 1.1 # directories are named by the second
venv/bin/python log.py apart 3000 4000
venv/bin/python log.py touching 2000 3000
venv/bin/python log.py overlapping 5 6 7 20

venv/bin/python server.py &
server=$!
until [ -s port ]; do sleep 0.2; done
export WANDB_BASE_URL="http://127.0.0.1:$(cat port)" WANDB_API_KEY=0123456789012345678901234567890123456789
(cd runs && timeout 300 ../venv/bin/wandb sync --yes)

venv/bin/python - <<'PYTHON'
import json

with open("history.json") as file:
    seen = {name: [line["_step"] for line in lines] for name, lines in json.load(file).items()}
print(seen)
assert seen == {
    "apart": [1000, 2000, 3000, 4000],
    "touching": [1000, 2000, 2001, 3000],
    "overlapping": [1, 2, 3, 4, 5, 6, 7, 8, 9, 20],
}, "wandb numbers steps otherwise now"
PYTHON
