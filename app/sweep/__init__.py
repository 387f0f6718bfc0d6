"""The sweep stage: FP16 and several schemes with several seeds, as ordinary runs, and one report of them all."""
