#!/bin/sh
# One machine: a cluster that outlives its jobs, and a job on it. Run the second command again for the next one.
#
#     sh cluster/local.sh --config run.yaml
#
# The cluster asks for the token in ~/.ray/auth_token and, by the second setting, listens on loopback alone; without it Ray would listen on
# every interface. For a single job no cluster is needed: `python jobs/fit_kron.py` starts a private one.
set -eu
export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
ray get-auth-token --generate > /dev/null

ray status > /dev/null 2>&1 || ray start --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats
exec ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/fit_kron.py "$@"
