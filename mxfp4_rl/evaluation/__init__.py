"""`mxfp4-rl eval`: how many of a task's held-out problems a checkpoint answers, with and without the quantiser.

    command   the arguments, what they stand for, the table and the JSON
    sources   where model, recipe, questions and reward come from
    measure   sampling replies, scoring them, pooling the scores

Nothing here imports torch at the top level but `measure`: a mistake on the command line is answered in a second.
"""
