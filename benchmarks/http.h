/* What the two C servers of the benchmarks share: a connection, the head of a request, listening.
 *
 * With -DTLS (and -lssl -lcrypto) a connection that begins with a handshake is one of TLS 1.3, once
 * use_tls was given a certificate; all others, and all where it was not, are plain as without.
 */
#ifndef BENCH_HTTP_H
#define BENCH_HTTP_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/ssl.h>
#endif

enum { BUFFER = 65536, TARGET = 8192, HEADERS = 16384, RECORD = 16384, ADDRESSES = 64 };

struct stream {
    int fd;
    int address; /* that it came to: 127.0.0.1 is 0 */
#ifdef TLS
    SSL *tls; /* NULL: a plain connection */
#endif
    size_t at, end; /* data[at..end) is received and not consumed yet */
    unsigned long long due; /* nanoseconds: when a paced connection may go on */
    char data[BUFFER];
};

struct request {
    char method[8], target[TARGET], headers[HEADERS]; /* headers: lines, each begins with \n */
    size_t length;                                    /* Content-Length */
    int chunked, expects_continue;
};

static inline size_t held(const struct stream *s) { return s->end - s->at; }

/* recv, on either kind of connection; over TLS one record, whatever the flags say. */
static inline ssize_t take(struct stream *s, void *to, size_t length, int flags) {
#ifdef TLS
    if (s->tls) return SSL_read(s->tls, to, length < (1u << 30) ? (int)length : 1 << 30);
#endif
    return recv(s->fd, to, length, flags);
}

/* sendmsg, on either kind of connection; over TLS small pieces go into one record together. */
static inline ssize_t give(struct stream *s, struct iovec *v, int count) {
#ifdef TLS
    if (s->tls) {
        char record[RECORD];
        size_t n = 0;
        if (count == 1 || v->iov_len >= RECORD) return SSL_write(s->tls, v->iov_base, v->iov_len < (1u << 30) ? (int)v->iov_len : 1 << 30);
        for (; count && n < RECORD; v++, count--) {
            size_t step = v->iov_len < RECORD - n ? v->iov_len : RECORD - n;
            memcpy(record + n, v->iov_base, step);
            n += step;
        }
        return SSL_write(s->tls, record, (int)n);
    }
#endif
    struct msghdr message = {.msg_iov = v, .msg_iovlen = (size_t)count};
    return sendmsg(s->fd, &message, MSG_NOSIGNAL);
}

/* Send all of the pieces, which are used up by it. */
static inline int say_all(struct stream *s, struct iovec *v, int count) {
    for (;;) {
        while (count && !v->iov_len) v++, count--;
        if (!count) return 1;
        ssize_t sent = give(s, v, count);
        if (sent <= 0) return 0;
        while (sent) {
            size_t step = (size_t)sent < v->iov_len ? (size_t)sent : v->iov_len;
            v->iov_base = (char *)v->iov_base + step, v->iov_len -= step, sent -= (ssize_t)step;
            if (!v->iov_len) v++, count--;
        }
    }
}

static inline int say(struct stream *s, const char *text, size_t length) {
    return say_all(s, &(struct iovec){(char *)text, length}, 1);
}

static inline int fill(struct stream *s) {
    if (s->at) {
        memmove(s->data, s->data + s->at, held(s));
        s->end -= s->at;
        s->at = 0;
    }
    if (s->end == BUFFER) return 0;
    ssize_t n = take(s, s->data + s->end, BUFFER - s->end, 0);
    if (n <= 0) return 0;
    s->end += (size_t)n;
    return 1;
}

/* The value of header `name` (lower case, with its colon), copied into `out`; 0 where there is none. */
static inline int header(const struct request *r, const char *name, char *out, size_t room) {
    const char *line = r->headers;
    size_t n = strlen(name);
    for (line = strchr(line, '\n'); line; line = strchr(line, '\n')) {
        line++;
        if (strncasecmp(line, name, n)) continue;
        line += n;
        while (*line == ' ') line++;
        size_t length = strcspn(line, "\r\n");
        if (length >= room) length = room - 1;
        memcpy(out, line, length);
        out[length] = 0;
        return 1;
    }
    if (room) *out = 0;
    return 0;
}

/* Read the next head; 0 at the end of the connection or on nonsense. Answers Expect: 100-continue. */
static inline int read_head(struct stream *s, struct request *r) {
    char *end, value[64];
    while (!(end = memmem(s->data + s->at, held(s), "\r\n\r\n", 4)))
        if (!fill(s)) return 0;
    char *head = s->data + s->at;
    *end = 0;
    s->at = (size_t)(end - s->data) + 4;
    char *lines = strchr(head, '\n');
    if (sscanf(head, "%7s %8191s", r->method, r->target) != 2) return 0;
    snprintf(r->headers, sizeof r->headers, "%s", lines ? lines : "");
    r->length = header(r, "content-length:", value, sizeof value) ? strtoul(value, NULL, 10) : 0;
    r->chunked = header(r, "transfer-encoding:", value, sizeof value);
    r->expects_continue = header(r, "expect:", value, sizeof value);
    return !r->expects_continue || say(s, "HTTP/1.1 100 Continue\r\n\r\n", 25);
}

/* A line of the body (a chunk's size, a trailer) into `out`, without its end. */
static inline int read_line(struct stream *s, char *out, size_t room) {
    char *end;
    while (!(end = memmem(s->data + s->at, held(s), "\r\n", 2)))
        if (!fill(s)) return 0;
    size_t length = (size_t)(end - (s->data + s->at));
    if (length >= room) return 0;
    memcpy(out, s->data + s->at, length);
    out[length] = 0;
    s->at += length + 2;
    return 1;
}

/* Drop `length` bytes of the body inside the kernel (MSG_TRUNC copies nothing on TCP); TLS has to decrypt them. */
static inline int drop(struct stream *s, size_t length) {
    size_t now = length < held(s) ? length : held(s);
    s->at += now;
    for (length -= now; length;) {
        ssize_t n;
#ifdef TLS
        if (s->tls) n = SSL_read(s->tls, s->data, length < BUFFER ? (int)length : BUFFER), s->at = s->end = 0;
        else
#endif
            n = recv(s->fd, NULL, length < (1u << 20) ? length : (1u << 20), MSG_TRUNC);
        if (n <= 0) return 0;
        length -= (size_t)n;
    }
    return 1;
}

#ifdef TLS
static SSL_CTX *tls_context; /* NULL: everything is plain */
static unsigned long tls_full, tls_resumed;

/* Connections that begin with a handshake get one from now on. One context, so that the ticket which
 * one address gave is resumed at any other, as the front ends of a store do. */
static inline int use_tls(const char *certificate, const char *key) {
    SSL_CTX *made = SSL_CTX_new(TLS_server_method());
    if (!made || !SSL_CTX_set_min_proto_version(made, TLS1_3_VERSION) || SSL_CTX_use_certificate_chain_file(made, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(made, key, SSL_FILETYPE_PEM) != 1) {
        fprintf(stderr, "%s or %s cannot be used\n", certificate, key);
        return 0;
    }
    SSL_CTX_set_session_cache_mode(made, SSL_SESS_CACHE_OFF); /* a ticket holds the whole session */
    SSL_CTX_set_read_ahead(made, 1);                          /* a record's head and body in one recv */
    tls_context = made;
    return 1;
}

/* The handshake, if the first byte says that there is one. */
static inline int greet(struct stream *s) {
    unsigned char first;
    if (!tls_context || recv(s->fd, &first, 1, MSG_PEEK) != 1 || first != 22) return 1;
    s->tls = SSL_new(tls_context);
    if (!s->tls || !SSL_set_fd(s->tls, s->fd) || SSL_accept(s->tls) != 1) return 0;
    __atomic_fetch_add(SSL_session_reused(s->tls) ? &tls_resumed : &tls_full, 1, __ATOMIC_RELAXED);
    return 1;
}
#else
enum { tls_full, tls_resumed };

static inline int use_tls(const char *certificate, const char *key) {
    fprintf(stderr, "built without TLS: %s and %s cannot be used\n", certificate, key);
    return 0;
}

static inline int greet(struct stream *s) { return s != NULL; }
#endif

static inline void hang_up(struct stream *s) {
#ifdef TLS
    if (s->tls) SSL_shutdown(s->tls), SSL_free(s->tls);
#endif
    close(s->fd);
    free(s);
}

struct listener {
    int fd, address;
    void *(*serve)(void *);
};

/* Give each connection a thread; it ends with an error only. */
static inline void *accept_forever(void *argument) {
    const struct listener *l = argument;
    for (int one = 1;;) {
        int fd = accept(l->fd, NULL, NULL);
        if (fd < 0) continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct stream *s = calloc(1, sizeof *s);
        pthread_t thread;
        if (!s) exit(1);
        s->fd = fd;
        s->address = l->address;
        if (pthread_create(&thread, NULL, l->serve, s)) exit(1);
        pthread_detach(thread);
    }
}

/* Listen on `port` (0: any) of 127.0.0.1, 127.0.0.2 ... 127.0.0.`count`; returns the port, or 0. */
static inline int listen_on(struct listener *listeners, int port, int count) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    socklen_t length = sizeof at;
    for (int i = 0, one = 1; i < count; i++) {
        int fd = listeners[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (unsigned)i);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 1024) || getsockname(fd, (struct sockaddr *)&at, &length)) {
            int error = errno;
            for (; i >= 0; i--) close(listeners[i].fd);
            errno = error;
            return 0;
        }
    }
    return ntohs(at.sin_port);
}

/* Serve each connection on `port` (0: any) of the first `count` addresses of loopback in a thread; prints
 * the port; ends with its parent. */
static inline int listen_forever(int port, int count, void *(*serve)(void *)) {
    static struct listener listeners[ADDRESSES];
    int found = 0;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    signal(SIGPIPE, SIG_IGN);
    if (count < 1 || count > ADDRESSES) {
        fprintf(stderr, "1 to %d addresses\n", ADDRESSES);
        return 2;
    }
    for (int tries = port ? 1 : 20; tries && !found; tries--) found = listen_on(listeners, port, count); /* a port may be taken on one of them */
    if (!found) {
        perror("listen");
        return 1;
    }
    for (int i = 0; i < count; i++) {
        pthread_t thread;
        listeners[i].address = i;
        listeners[i].serve = serve;
        if (i && pthread_create(&thread, NULL, accept_forever, &listeners[i])) return 1;
    }
    printf("%d\n", found);
    fflush(stdout);
    accept_forever(&listeners[0]);
    return 1;
}

#endif
