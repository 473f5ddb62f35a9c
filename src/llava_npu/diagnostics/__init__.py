"""Is this machine set up (`doctor`), and are its numbers right (`verify`)?

`doctor` diagnoses machines on which nothing works: its files import only the standard library. Whatever may break or
hang (torch, an accelerator's driver) is tried in a process of its own, `probe`.
"""
