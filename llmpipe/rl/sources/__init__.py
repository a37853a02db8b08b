"""Where scores come from, a file for what needs one; `rewards` adds them up.

models      reward models
functions   functions of the user's files
texts       what a text tells, alone or with its row: verifiers, forms, lengths, programs, judges,
            environments
"""
