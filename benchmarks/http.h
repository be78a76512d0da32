/* What the two C servers of the benchmarks share: a connection, the head of a request, listening. */
#ifndef BENCH_HTTP_H
#define BENCH_HTTP_H

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER = 65536, TARGET = 8192, HEADERS = 16384 };

struct stream {
    int fd;
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

static inline int fill(struct stream *s) {
    if (s->at) {
        memmove(s->data, s->data + s->at, held(s));
        s->end -= s->at;
        s->at = 0;
    }
    if (s->end == BUFFER) return 0;
    ssize_t n = recv(s->fd, s->data + s->end, BUFFER - s->end, 0);
    if (n <= 0) return 0;
    s->end += (size_t)n;
    return 1;
}

static inline int say(int fd, const char *text, size_t length) {
    while (length) {
        ssize_t n = send(fd, text, length, MSG_NOSIGNAL);
        if (n <= 0) return 0;
        text += n;
        length -= (size_t)n;
    }
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
    return !r->expects_continue || say(s->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25);
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

/* Drop `length` bytes of the body inside the kernel (MSG_TRUNC copies nothing on TCP). */
static inline int drop(struct stream *s, size_t length) {
    size_t now = length < held(s) ? length : held(s);
    s->at += now;
    for (length -= now; length;) {
        ssize_t n = recv(s->fd, NULL, length < (1u << 20) ? length : (1u << 20), MSG_TRUNC);
        if (n <= 0) return 0;
        length -= (size_t)n;
    }
    return 1;
}

/* Serve each connection on 127.0.0.1:`port` (0: any) in a thread; prints the port; ends with its parent. */
static inline int listen_forever(int port, void *(*serve)(void *)) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    socklen_t length = sizeof at;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    signal(SIGPIPE, SIG_IGN);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1024) ||
        getsockname(listener, (struct sockaddr *)&at, &length)) {
        perror("listen");
        return 1;
    }
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct stream *s = calloc(1, sizeof *s);
        pthread_t thread;
        if (!s) return 1;
        s->fd = fd;
        if (pthread_create(&thread, NULL, serve, s)) return 1;
        pthread_detach(thread);
    }
}

#endif
