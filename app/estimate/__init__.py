"""The estimate stage: what the whole job will take on this machine, from a pilot job on a few images."""
