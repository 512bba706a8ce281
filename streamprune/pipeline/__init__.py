"""The job. `compress` runs it; `two_passes` is one block from read to journal, `weights_only` the same without a text.

`planning` is what precedes the loop, `writing` what it leaves on disk; the other files are the loop's parts.
"""
