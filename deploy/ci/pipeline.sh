#!/usr/bin/env bash
# One step of the way from an ONNX file to production; GitHub Actions and GitLab CI call the same steps.
#
#   pipeline.sh verify | add | staging | gate | promote | production
#
# Settings come from the environment (README.md lists them). Results, one file each, go to $RESULTS. A step fails with
# repo-manager's own exit code: 3 bad input, 4 a gate failed, 5 the roll-out was undone, 7 act by hand.
set -euo pipefail

results=${RESULTS:-pipeline-results}
mkdir -p "$results"

# A result of an earlier step. Only assign it (x=$(recall y)): elsewhere its failure would be lost.
recall() {
  cat "$results/$1" 2>/dev/null || { echo "pipeline.sh: $results/$1 is missing: run the steps in order" >&2; exit 2; }
}

# A value from the JSON on standard input: field a.b.c
field() {
  python3 -c 'import functools, json, sys; print(functools.reduce(lambda d, k: d[k], sys.argv[1].split("."), json.load(sys.stdin)))' "$1"
}

# For the CI system: an output of the job, and a line in its summary.
output() { if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "$1=$2" >>"$GITHUB_OUTPUT"; fi; }
summary() { if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then cat >>"$GITHUB_STEP_SUMMARY"; else cat; fi; }

# Where a server answers inferences: its own address, except for a target in a cluster.
inference_at() { # inference_at VARIABLE SERVER ADDRESS
  if [ -n "$3" ]; then echo "$3"; return; fi
  case "$2" in
    grpc://* | grpcs://* | http://* | https://*) echo "$2" ;;
    *) echo "pipeline.sh: $2 answers no inference; set $1 to the address that does, grpc://HOST:PORT" >&2; exit 2 ;;
  esac
}

gates=()
while IFS= read -r gate; do
  if [ -n "$gate" ]; then gates+=(--slo "$gate"); fi
done <<<"${GATES:-}"

measure() { # measure NAME:VERSION SERVER REPOSITORY REPORT
  repo-manager loadtest "$1" --url "$2" --repository "$3" --concurrency "${CONCURRENCY:-8}" --duration "${DURATION:-10}" \
    ${gates[@]+"${gates[@]}"} --report "$results/$4.json" --report "$results/$4.xml" --report "$results/$4.md" --quiet
}

roll_out() { # roll_out VERB WHAT SERVER REPOSITORY [OPTION...]
  local keys=()
  if [ -n "${SIGNED_BY:-}" ] && [ "$1" != undeploy ]; then keys=(--signed-by "$SIGNED_BY"); fi
  if [ -n "${DEPLOY_TIMEOUT:-}" ]; then keys+=(--timeout "$DEPLOY_TIMEOUT"); fi
  repo-manager "$1" "$2" --to "$3" --repository "$4" ${keys[@]+"${keys[@]}"} "${@:5}"
}

case "${1:-}" in
  verify)
    # A new team's folder is an empty repository; object storage has no folders.
    case "$STAGING_REPOSITORY" in *://*) ;; *) mkdir -p "$STAGING_REPOSITORY" ;; esac
    repo-manager verify --repository "$STAGING_REPOSITORY"
    repo-manager inspect "$MODEL_FILE" --json >"$results/inspect.json"
    ;;
  add)
    calibration=()
    if [ -n "${CALIBRATION:-}" ]; then calibration=(--calibration "$CALIBRATION"); fi
    repo-manager add "$MODEL_FILE" --name "$MODEL_NAME" --precision "${PRECISION:-fp32}" ${calibration[@]+"${calibration[@]}"} \
      --backend "${BACKEND:-auto}" --sparsity "${SPARSITY:-report}" --repository "$STAGING_REPOSITORY" --json >"$results/add.json"
    field version <"$results/add.json" >"$results/version"
    version=$(recall version)
    if [ -n "${SIGN_KEY:-}" ]; then repo-manager sign "$MODEL_NAME:$version" --key "$SIGN_KEY" --repository "$STAGING_REPOSITORY"; fi
    output version "$version"
    echo "Added **$MODEL_NAME:$version** (${PRECISION:-fp32}) to staging." | summary
    ;;
  staging)
    version=$(recall version)
    inference_at STAGING_INFERENCE "$STAGING_SERVER" "${STAGING_INFERENCE:-}" >/dev/null # or the gate could never pass
    roll_out deploy "$MODEL_NAME:$version" "$STAGING_SERVER" "$STAGING_REPOSITORY"
    ;;
  gate)
    version=$(recall version)
    address=$(inference_at STAGING_INFERENCE "$STAGING_SERVER" "${STAGING_INFERENCE:-}")
    code=0
    measure "$MODEL_NAME:$version" "$address" "$STAGING_REPOSITORY" gate || code=$?
    if [ -f "$results/gate.md" ]; then summary <"$results/gate.md"; fi
    exit "$code"
    ;;
  promote)
    version=$(recall version)
    repo-manager copy "$MODEL_NAME:$version" --into "$PRODUCTION_REPOSITORY" --repository "$STAGING_REPOSITORY" \
      --json >"$results/promote.json"
    field version <"$results/promote.json" >"$results/production-version"
    promoted=$(recall production-version)
    output production-version "$promoted"
    ;;
  production)
    promoted=$(recall production-version)
    target="$MODEL_NAME:$promoted"
    if [ "${PRODUCTION_CHECK:-true}" = true ]; then
      address=$(inference_at PRODUCTION_INFERENCE "$PRODUCTION_SERVER" "${PRODUCTION_INFERENCE:-}")
    fi
    trial=()
    if [ -n "${CANARY:-}" ]; then trial=(--canary "$CANARY" --step "${CANARY_STEP:-5m}"); fi
    roll_out deploy "$target" "$PRODUCTION_SERVER" "$PRODUCTION_REPOSITORY" ${trial[@]+"${trial[@]}"}
    # `deploy` undoes itself. It cannot see the version under production's own load.
    if [ "${PRODUCTION_CHECK:-true}" = true ]; then
      code=0
      measure "$target" "$address" "$PRODUCTION_REPOSITORY" production || code=$?
      if [ -f "$results/production.md" ]; then summary <"$results/production.md"; fi
      if [ "$code" -ne 0 ]; then
        echo "**$target** failed its check in production; going back." | summary
        back=0
        roll_out rollback "$MODEL_NAME" "$PRODUCTION_SERVER" "$PRODUCTION_REPOSITORY" || back=$?
        # Exit code 3: it is the first version, and there is none to go back to.
        if [ "$back" -eq 3 ]; then
          back=0
          roll_out undeploy "$target" "$PRODUCTION_SERVER" "$PRODUCTION_REPOSITORY" || back=$?
          if [ "$back" -eq 0 ]; then echo "It was the first version: **$target** was taken out of service." | summary; fi
        fi
        if [ "$back" -ne 0 ]; then
          echo "**$target still serves in production**: taking it back ended with exit code $back." | summary
        fi
        exit "$code"
      fi
    fi
    echo "**$target** serves in production." | summary
    ;;
  *)
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
