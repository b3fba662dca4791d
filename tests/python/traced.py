"""A subsystem that traces with OpenTelemetry's packages for Python: `traced.py PROTO_DIR COLLECTOR`."""

import sys
from concurrent import futures

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

proto_dir, collector = sys.argv[1:]
sys.path.insert(0, proto_dir)
pb, rpc = grpc.protos_and_services("dreamnet/subsystem/v1/subsystem.proto")

provider = TracerProvider(resource=Resource.create({"service.name": "python"}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=f"http://{collector}", insecure=True)))
tracer = provider.get_tracer("traced")


class Traced(rpc.SubsystemServicer):
    def Initialize(self, request, context):
        return pb.InitializeResponse()

    def RunCycle(self, request, context):
        with tracer.start_as_current_span("think"):
            return pb.RunCycleResponse()


server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[server_interceptor(tracer_provider=provider)])
rpc.add_SubsystemServicer_to_server(Traced(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"listening on 127.0.0.1:{port}", flush=True)
server.wait_for_termination()
