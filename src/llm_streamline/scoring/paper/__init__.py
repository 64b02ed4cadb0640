"""The sets of the paper that lm-eval lacks, as its task files: `lm_eval --tasks FILE.yaml` takes them too."""
