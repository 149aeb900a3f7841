"""What the tests of preflight share: records, and how findings are looked at."""


def record(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def of(report, check):
    return [finding for finding in report.findings if finding.check == check]


def states(report, *checks):
    return {check: [finding.state for finding in of(report, check)] for check in checks}


def files_below(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))
