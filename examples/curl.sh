#!/usr/bin/env bash
# Headgate by curl: which models there are, a stream, an answer of a given form, and why a request
# went where it went.    bash examples/curl.sh
set -euo pipefail
url="http://127.0.0.1:${HEADGATE_PORT:-8080}"

ask() { # a body; more options of curl before it
  curl -sS "${@:1:$#-1}" "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "${!#}"
}

echo "== models"
curl -sS "$url/v1/models"

echo; echo "== a stream"
ask -N '{"model": "pocket", "temperature": 0, "stream": true, "max_tokens": 12,
  "messages": [{"role": "user", "content": "Rewrite as year-month-day: July 18, 2032."}]}'

echo "== an answer of a given form"
ask '{"model": "pocket", "temperature": 0, "max_tokens": 40,
  "messages": [{"role": "user", "content": "Read order, amount into JSON: The amount is 233 euros. My order is BN-9692."}],
  "response_format": {"type": "json_schema", "json_schema": {"name": "order", "strict": true, "schema": {
    "type": "object", "additionalProperties": false, "required": ["order", "amount"],
    "properties": {"order": {"type": "string"}, "amount": {"type": "integer"}}}}}}'

echo; echo "== why it went where it went"
receipt=$(ask -D - -o /dev/null '{"model": "pocket", "max_tokens": 1,
  "messages": [{"role": "user", "content": "hello"}]}' | tr -d '\r' | sed -n 's/^x-headgate-receipt: //p')
curl -sS "$url/v1/receipts/$receipt"
