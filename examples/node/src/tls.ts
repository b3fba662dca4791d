// TLS with the files in a directory that `orchestrator certs issue` has made: cert.pem, key.pem and ca.pem.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { PeerCertificate } from "node:tls";
import { credentials, ServerCredentials, type ChannelCredentials } from "@grpc/grpc-js";

const file = (directory: string, name: string) => readFileSync(join(directory, name));

/** For a client. Without a directory there is no TLS. */
export const clientCredentials = (directory?: string): ChannelCredentials =>
  directory === undefined
    ? credentials.createInsecure()
    : credentials.createSsl(file(directory, "ca.pem"), file(directory, "key.pem"), file(directory, "cert.pem"));

/** For a server, whose clients need a certificate: `isOf` says whose it is. Without a directory there is no TLS. */
export const serverCredentials = (directory?: string): ServerCredentials =>
  directory === undefined
    ? ServerCredentials.createInsecure()
    : ServerCredentials.createSsl(
        file(directory, "ca.pem"),
        [{ private_key: file(directory, "key.pem"), cert_chain: file(directory, "cert.pem") }],
        true,
      );

/** True if `uri` is the only URI among the names of the certificate of a client. */
export function isOf(certificate: PeerCertificate | undefined, uri: string): boolean {
  // Such as "DNS:localhost, IP Address:127.0.0.1, URI:spiffe://fleet/core". Node puts a name with commas in quotes.
  const names = certificate?.subjectaltname ?? "";
  const uris = names.split(", ").filter((name) => name.startsWith("URI:"));
  return !names.includes('"') && uris.length === 1 && uris[0] === `URI:${uri}`;
}
