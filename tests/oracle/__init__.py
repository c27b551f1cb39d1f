"""The Linux kernel's DLM as oracle: `python -m tests.oracle`, or `make oracle`; docs/design/dlm-oracle.md tells more.

`generate` makes runs of calls from a seed. `boot` starts one or two user-mode Linuxes whose init is `guest.sh`; that
brings up corosync and dlm_controld and starts `driver`, which makes the calls through libdlm and writes down what came
of them, three times. `compare` keeps what was the same each time and plays it against our engine.
"""
