"""The command line: one command per file, which parses, calls and prints.

Installed as chunkcache.cli; imports among its modules are relative, so that tools that
read the source tree find them as well.
"""
