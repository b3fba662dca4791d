// Where the orchestrator is, and what is shown to it: a certificate, which also serves, or a token.

import { closeSync, fstatSync, openSync, readFileSync, statSync } from "node:fs";
import { isIP } from "node:net";
import { join } from "node:path";
import { checkServerIdentity, type PeerCertificate } from "node:tls";
import { type ChannelCredentials, credentials as channel, Metadata, ServerCredentials } from "@grpc/grpc-js";
import { describe, OptionError } from "./errors.js";
import { refuse } from "./options.js";

/** Where an orchestrator, or another gRPC server, listens. */
export class Address {
  private constructor(
    /** With its scheme: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`. */
    readonly url: string,
  ) {}

  /**
   * Reads it. HOST:PORT gets this scheme.
   *
   * @throws OptionError
   */
  static parse(option: string, given: unknown, scheme: "http" | "https" = "http"): Address {
    if (typeof given === "string") {
      if (/^unix:\/\S+$/.test(given)) return new Address(given);
      const match = /^(?:(https?):\/\/)?(\[[\da-f:.]+\]|[^\s/@?#:]+):(\d{1,5})\/?$/i.exec(given.trim());
      if (match && Number(match[3]) <= 65_535) return new Address(`${match[1] ?? scheme}://${match[2]}:${match[3]}`);
    }
    return refuse(option, given, "http://HOST:PORT, https://HOST:PORT or unix:/PATH");
  }

  /** As gRPC dials it. */
  get target(): string {
    return this.isUnix ? this.url : this.url.slice(this.url.indexOf("://") + 3);
  }

  /** Without the port. */
  get host(): string {
    return this.target.slice(0, this.target.lastIndexOf(":"));
  }

  get isUnix(): boolean {
    return this.url.startsWith("unix:");
  }

  get isTls(): boolean {
    return this.url.startsWith("https:");
  }

  /** True if it can only be on this machine. */
  get isLocal(): boolean {
    if (this.isUnix) return true;
    const host = this.host.replace(/^\[|\]$/g, "");
    return host.toLowerCase() === "localhost" || host === "::1" || (isIP(host) === 4 && host.startsWith("127."));
  }
}

/** A directory with a certificate, as `orchestrator certs issue` makes it, or a file with a token, or nothing. */
export class Credentials {
  /** True for a directory with cert.pem, key.pem and ca.pem. */
  readonly hasCertificate: boolean;

  /**
   * `caFile` has, with a token or nothing, the only authorities of a server that are trusted, if not the system's.
   *
   * @throws OptionError if the path does not exist
   */
  constructor(
    readonly path?: string,
    readonly caFile?: string,
  ) {
    const found = path === undefined ? undefined : statSync(path, { throwIfNoEntry: false });
    if (path !== undefined && !found) {
      const give = "give a directory with cert.pem, key.pem and ca.pem, or a file with a token";
      throw new OptionError(`credentials: ${path} does not exist; ${give}`);
    }
    this.hasCertificate = found?.isDirectory() ?? false;
  }

  /** @throws OptionError if they can't be used with this orchestrator */
  check(orchestrator: Address | undefined): void {
    if (this.path === undefined) return;
    if (this.hasCertificate) {
      this.certificate();
      if (orchestrator && !orchestrator.isTls) {
        const advice = orchestrator.url.replace("http:", "https:");
        throw new OptionError(`credentials: the certificate is not used at ${orchestrator.url}; give ${advice}`);
      }
    } else if (orchestrator) {
      this.token();
      if (!orchestrator.isTls && !orchestrator.isLocal) {
        const sent = `the token would be sent in clear to ${orchestrator.url}`;
        throw new OptionError(`credentials: ${sent}; give an address with https://`);
      }
    }
  }

  /**
   * For a server, whose clients need a certificate of the same authority. Without a certificate there is no TLS.
   *
   * @throws OptionError if the files can't be read
   */
  serving(): ServerCredentials {
    if (!this.hasCertificate) return ServerCredentials.createInsecure();
    const { key, certificate, authority } = this.certificate();
    return ServerCredentials.createSsl(authority, [{ private_key: key, cert_chain: certificate }], true);
  }

  /**
   * For a client of this address, with the files as they are now. With `accepts`, it connects only to a server whose
   * certificate has an accepted URI.
   *
   * @throws OptionError if the files can't be read
   */
  connecting(address: Address, accepts?: (uri: string | undefined) => boolean): ChannelCredentials {
    if (!address.isTls) return channel.createInsecure();
    if (!this.hasCertificate) return channel.createSsl(this.caFile === undefined ? null : read(this.caFile));
    const { key, certificate, authority } = this.certificate();
    if (!accepts) return channel.createSsl(authority, key, certificate);
    return channel.createSsl(authority, key, certificate, {
      checkServerIdentity: (host, peer) => {
        const uri = uriOf(peer);
        const why = `a server with the certificate of ${uri ?? "no URI"} answers, which is not accepted`;
        return checkServerIdentity(host, peer) ?? (accepts(uri) ? undefined : new Error(why));
      },
    });
  }

  /**
   * What each call to the orchestrator carries.
   *
   * @throws OptionError if the file with the token can't be read
   */
  metadata(): Metadata {
    const metadata = new Metadata();
    if (this.path !== undefined && !this.hasCertificate) metadata.set("authorization", `Bearer ${this.token()}`);
    return metadata;
  }

  private certificate() {
    const file = (name: string, isSecret = false) => read(join(this.path!, name), isSecret);
    return { key: file("key.pem", true), certificate: file("cert.pem"), authority: file("ca.pem") };
  }

  private token(): string {
    const token = read(this.path!, true).toString().trim();
    if (/^[!-~]+$/.test(token)) return token;
    throw new OptionError(`credentials: ${this.path} contains no token; it has the form orc_ID_SECRET, or is a JWT`);
  }
}

const OTHERS = 0o077;
// A file of root may be readable by its group: so services get secrets.
const OTHERS_OF_ROOT = 0o037;

function read(path: string, isSecret = false): Buffer {
  let file: number | undefined;
  try {
    file = openSync(path, "r");
    const { mode, uid } = fstatSync(file);
    if (isSecret && mode & (uid === 0 ? OTHERS_OF_ROOT : OTHERS)) {
      const shown = (mode & 0o7777).toString(8).padStart(4, "0");
      const why = "so that other users of this machine could use it";
      throw new OptionError(`credentials: ${path} has mode ${shown}, ${why}; run chmod 600 on it`);
    }
    return readFileSync(file);
  } catch (error) {
    if (error instanceof OptionError) throw error;
    throw new OptionError(`credentials: ${path} can't be read: ${describe(error)}`);
  } finally {
    if (file !== undefined) closeSync(file);
  }
}

/** The URI of a peer in its certificate, if it has exactly one. Undefined without TLS. */
export function uriOf(certificate: PeerCertificate | undefined): string | undefined {
  // Such as "DNS:localhost, IP Address:127.0.0.1, URI:spiffe://fleet/core". Node puts a name with commas in quotes.
  const names = certificate?.subjectaltname ?? "";
  const uris = names.split(", ").filter((name) => name.startsWith("URI:"));
  return names.includes('"') || uris.length !== 1 ? undefined : uris[0]!.slice("URI:".length);
}
