package dreamnet.example;

import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.Metadata;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerCredentials;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.TlsChannelCredentials;
import io.grpc.TlsServerCredentials;
import io.grpc.util.AdvancedTlsX509KeyManager;
import io.grpc.util.AdvancedTlsX509TrustManager;
import java.io.File;
import java.io.IOException;
import java.security.GeneralSecurityException;
import java.security.cert.CertificateParsingException;
import java.security.cert.X509Certificate;
import java.util.Collection;
import java.util.List;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLPeerUnverifiedException;
import javax.net.ssl.SSLSession;

/**
 * TLS with the files in a directory that {@code orchestrator certs issue} has made. They are read again when they have
 * changed, which is checked every minute, and used for new connections.
 */
final class Tls {
    private final AdvancedTlsX509KeyManager own = new AdvancedTlsX509KeyManager();
    private final AdvancedTlsX509TrustManager authority;

    Tls(String directory) throws IOException, GeneralSecurityException {
        ScheduledExecutorService timer = Executors.newSingleThreadScheduledExecutor(task -> {
            Thread thread = new Thread(task);
            thread.setDaemon(true);
            return thread;
        });
        authority = AdvancedTlsX509TrustManager.newBuilder().build();
        authority.updateTrustCredentials(new File(directory, "ca.pem"), 1, TimeUnit.MINUTES, timer);
        own.updateIdentityCredentials(
                new File(directory, "cert.pem"), new File(directory, "key.pem"), 1, TimeUnit.MINUTES, timer);
    }

    ChannelCredentials ofClient() {
        return TlsChannelCredentials.newBuilder().keyManager(own).trustManager(authority).build();
    }

    /** Each client needs a certificate; {@link OnlyFrom} looks whose it is. */
    ServerCredentials ofServer() {
        return TlsServerCredentials.newBuilder()
                .keyManager(own)
                .trustManager(authority)
                .clientAuth(TlsServerCredentials.ClientAuth.REQUIRE)
                .build();
    }

    /**
     * Refuses calls of other clients than the one with this URI in its certificate: the authority has signed the
     * certificates of other subsystems as well.
     */
    record OnlyFrom(String caller) implements ServerInterceptor {
        private static final Integer URI = 6; // The type of these names: RFC 5280, 4.2.1.6.

        @Override
        public <Q, A> ServerCall.Listener<Q> interceptCall(
                ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
            if (uris(call.getAttributes().get(Grpc.TRANSPORT_ATTR_SSL_SESSION)).equals(List.of(caller))) {
                return next.startCall(call, headers);
            }
            call.close(Status.PERMISSION_DENIED.withDescription("only " + caller + " may call"), new Metadata());
            return new ServerCall.Listener<>() {};
        }

        private static List<?> uris(SSLSession session) {
            try {
                X509Certificate certificate = (X509Certificate) session.getPeerCertificates()[0];
                Collection<List<?>> names = certificate.getSubjectAlternativeNames();
                if (names == null) {
                    return List.of();
                }
                return names.stream().filter(name -> name.get(0).equals(URI)).map(name -> name.get(1)).toList();
            } catch (SSLPeerUnverifiedException | CertificateParsingException unusable) {
                return List.of();
            }
        }
    }
}
