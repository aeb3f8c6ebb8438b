"""Compare the check of ensembles with the real tritonserver over random graphs.

    python tests/fuzz/fuzz_ensembles.py [--graphs 300] [--seed 1]

Prints each disagreement with both verdicts, and the share of graphs with equal verdicts (bar: 98 %).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.random_ensembles import MODELS, configs_of, our_verdict, server_verdict, texts_of, write

from repo_manager.server.client import TritonClient
from repo_manager.server.command import ServerOptions
from repo_manager.server.embedded import EmbeddedServer

BAR = 0.98


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    texts = texts_of(args.graphs, args.seed)
    configs = configs_of(texts)
    agreed = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, texts)
        options = ServerOptions(repository=str(root), auto_complete=False, record=False)
        with EmbeddedServer(options) as server, TritonClient.connect(server.grpc_url) as client:
            for name in MODELS:
                server_verdict(name, client) if name == "broken" else client.load(name)
            for name, text in texts.items():
                ours, theirs = our_verdict(name, configs), server_verdict(name, client)
                refused += bool(theirs)
                if bool(ours) == bool(theirs):
                    agreed += 1
                    continue
                print(f"--- {name}\n{text}server: {theirs or 'loads it'}\nours:   {'; '.join(ours) or 'nothing'}\n")
    share = agreed / len(texts)
    print(f"{agreed} of {len(texts)} agree ({share:.1%}); the server refuses {refused}")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
