package dreamnet.example;

import dreamnet.orchestrator.v1.OrchestratorOuterClass.Registration;
import io.grpc.ChannelCredentials;
import io.grpc.InsecureChannelCredentials;
import io.grpc.InsecureServerCredentials;
import io.grpc.Server;
import io.grpc.ServerCredentials;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.protobuf.services.HealthStatusManager;
import java.net.InetSocketAddress;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.TimeUnit;

/** Serves the forecast until a signal stops it. */
final class Main {
    /** Time for running calls to end after a signal. */
    static final int GRACE_SECONDS = 5;

    /** Inputs can be larger than gRPC's default limit of 4 MiB. */
    private static final int MAX_MESSAGE_BYTES = 64 << 20;

    private static final Set<String> FLAGS =
            Set.of("--listen", "--name", "--orchestrator", "--credentials", "--caller", "--requires", "--after", "--reads");

    public static void main(String[] args) throws Exception {
        Map<String, String> flags = flags(args);
        String name = flags.getOrDefault("--name", "forecast");
        String listen = flags.getOrDefault("--listen", "127.0.0.1:50053");
        int colon = listen.lastIndexOf(':');
        String host = listen.substring(0, colon);

        String credentials = flags.get("--credentials");
        Tls tls = credentials == null ? null : new Tls(credentials);
        ServerCredentials ofServer = tls == null ? InsecureServerCredentials.create() : tls.ofServer();
        HealthStatusManager health = new HealthStatusManager();
        NettyServerBuilder builder = NettyServerBuilder.forAddress(
                        new InetSocketAddress(host, Integer.parseInt(listen.substring(colon + 1))), ofServer)
                .maxInboundMessageSize(MAX_MESSAGE_BYTES)
                .addService(new Forecast(name))
                .addService(health.getHealthService());
        if (tls != null) {
            builder.intercept(new Tls.OnlyFrom(flags.getOrDefault("--caller", "spiffe://fleet/core")));
        }
        Server server = builder.build().start();
        String address = host + ":" + server.getPort();
        System.out.println("listening on " + address);

        Registration registration = Registration.newBuilder()
                .setName(name)
                .setEndpoint((tls == null ? "http://" : "https://") + address)
                .addAllRequires(names(flags, "--requires"))
                .addAllAfter(names(flags, "--after"))
                .addAllReads(names(flags, "--reads"))
                .build();
        String orchestrator = flags.get("--orchestrator");
        ChannelCredentials ofClient = tls == null ? InsecureChannelCredentials.create() : tls.ofClient();
        Lease lease = orchestrator == null ? null : new Lease(registration, orchestrator, ofClient);

        // Runs at SIGTERM and SIGINT; the process ends after it.
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                if (lease != null) {
                    lease.close();
                }
                health.enterTerminalState();
                if (!server.shutdown().awaitTermination(GRACE_SECONDS, TimeUnit.SECONDS)) {
                    server.shutdownNow();
                }
            } catch (InterruptedException hurried) {
                server.shutdownNow();
            }
        }));
        server.awaitTermination();
    }

    private static Map<String, String> flags(String[] args) {
        Map<String, String> flags = new HashMap<>();
        for (int i = 0; i < args.length; i += 2) {
            if (!FLAGS.contains(args[i]) || i + 1 == args.length) {
                System.err.println(args[i] + " is not one of " + FLAGS + ", or has no value");
                System.exit(2);
            }
            flags.put(args[i], args[i + 1]);
        }
        return flags;
    }

    private static List<String> names(Map<String, String> flags, String flag) {
        return Arrays.stream(flags.getOrDefault(flag, "").split(",")).filter(name -> !name.isEmpty()).toList();
    }
}
