"""An OpenTelemetry collector as small as it can be: takes spans over gRPC and writes each as one JSON line.

It shares nothing with what it tests: the messages are OpenTelemetry's own, from the package opentelemetry-proto.
Usage: collector.py ADDRESS FILE
"""

import json
import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1 import trace_pb2 as trace


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Collector(service.TraceServiceServicer):
    def __init__(self, file):
        self.file = file

    def Export(self, request, context):
        for resource_spans in request.resource_spans:
            resource = attributes(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    line = {
                        "resource": resource,
                        "scope": scope_spans.scope.name,
                        "trace_id": span.trace_id.hex(),
                        "span_id": span.span_id.hex(),
                        "parent_span_id": span.parent_span_id.hex(),
                        "kind": trace.Span.SpanKind.Name(span.kind),
                        "name": span.name,
                        "start": span.start_time_unix_nano,
                        "end": span.end_time_unix_nano,
                        "status": trace.Status.StatusCode.Name(span.status.code),
                        "attributes": attributes(span.attributes),
                    }
                    self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        return messages.ExportTraceServiceResponse()


def main():
    address, path = sys.argv[1:]
    with open(path, "w") as file:
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        service.add_TraceServiceServicer_to_server(Collector(file), server)
        if server.add_insecure_port(address) == 0:
            sys.exit(f"cannot listen on {address}")
        server.start()
        print("collector is up", flush=True)
        server.wait_for_termination()


if __name__ == "__main__":
    main()
