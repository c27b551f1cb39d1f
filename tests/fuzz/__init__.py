"""Fuzzing: every decoder and every engine against input nobody sane would send.

    python -m tests.fuzz --seconds 60                 all targets in turn
    python -m tests.fuzz --target fence-engine        one of them;  --case 4711 runs one case again

A target makes one *case* from a number, runs it, and anything but a refusal of the documented kind is a finding. Cases
depend on nothing but target and number. Every target has a canary, the same target with a bug planted, which must fail:
it shows that the cases get as far as the bug.

generate.py  values of any declared message type, and damaged bytes     decoders.py, engines.py  the targets
"""
