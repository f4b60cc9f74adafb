"""Speed of `stage=tokenize`; see tokenize_speed.py, which does the work.

    OMP_NUM_THREADS=1 python benchmarks/tokenize.py [--tokenizer FOLDER] [--megabytes 8] [--repeats 5] [--json]

Python looks into a script's own folder first, so every script of this one that asks for the standard library's
`tokenize` (through `inspect`) gets this file. It then stands in for that module.
"""

if __name__ == "__main__":
    from tokenize_speed import main

    main()
else:
    import sysconfig

    _file = f"{sysconfig.get_path('stdlib')}/tokenize.py"
    with open(_file, encoding="utf-8") as _opened:
        exec(compile(_opened.read(), _file, "exec"))
