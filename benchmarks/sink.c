/* A server that swallows uploads: as little work as a server can do and still be taken for S3.
 *
 * Thread per connection. Reads the head of a request, drops its body inside the kernel
 * (recv with MSG_TRUNC copies nothing on TCP) and answers 200 with an ETag, or with the XML that
 * CreateMultipartUpload, CompleteMultipartUpload, DeleteObjects and ListObjects expect.
 * A checksum sent as a header comes back as a header, as S3 does it.
 * GET /__stats answers with the number of requests and body bytes seen so far.
 *
 * usage: sink [PORT]      prints the port it listens on; ends when its parent does
 */
#define _GNU_SOURCE
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

enum { BUFFER = 65536 };

static unsigned long requests, body_bytes;

struct stream {
    int fd;
    size_t have; /* bytes in `data` that are not consumed yet */
    char data[BUFFER];
};

struct request {
    char method[8], target[4096], checksum[64];
    size_t length;
    int chunked, expects_continue;
};

static int fill(struct stream *s) {
    ssize_t n = recv(s->fd, s->data + s->have, BUFFER - s->have, 0);
    if (n <= 0) return 0;
    s->have += (size_t)n;
    return 1;
}

static void consume(struct stream *s, size_t n) {
    memmove(s->data, s->data + n, s->have - n);
    s->have -= n;
}

static int read_head(struct stream *s, struct request *r) {
    char *end;
    while (!(end = memmem(s->data, s->have, "\r\n\r\n", 4)))
        if (s->have == BUFFER || !fill(s)) return 0;
    memset(r, 0, sizeof *r);
    *end = 0;
    if (sscanf(s->data, "%7s %4095s", r->method, r->target) != 2) return 0;
    for (char *line = strstr(s->data, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        if (!strncasecmp(line, "content-length:", 15)) r->length = strtoul(line + 15, NULL, 10);
        else if (!strncasecmp(line, "transfer-encoding:", 18)) r->chunked = 1;
        else if (!strncasecmp(line, "expect:", 7)) r->expects_continue = 1;
        else if (!strncasecmp(line, "x-amz-checksum-crc32c:", 22)) sscanf(line + 22, " %63[A-Za-z0-9+/=]", r->checksum);
    }
    consume(s, (size_t)(end - s->data) + 4);
    return 1;
}

static int drop(struct stream *s, size_t length) {
    size_t held = length < s->have ? length : s->have;
    consume(s, held);
    for (length -= held; length;) {
        ssize_t n = recv(s->fd, NULL, length < (1u << 20) ? length : (1u << 20), MSG_TRUNC);
        if (n <= 0) return 0;
        length -= (size_t)n;
    }
    return 1;
}

static int drop_chunked(struct stream *s, size_t *total) {
    for (*total = 0;;) {
        char *end;
        while (!(end = memmem(s->data, s->have, "\r\n", 2)))
            if (s->have == BUFFER || !fill(s)) return 0;
        size_t length = strtoul(s->data, NULL, 16);
        consume(s, (size_t)(end - s->data) + 2);
        if (!drop(s, length + 2)) return 0; /* the last chunk's own line end closes a body without trailers */
        *total += length;
        if (!length) return 1;
    }
}

static int say(int fd, const char *text, size_t length) {
    while (length) {
        ssize_t n = send(fd, text, length, MSG_NOSIGNAL);
        if (n <= 0) return 0;
        text += n;
        length -= (size_t)n;
    }
    return 1;
}

static int answer(struct stream *s, const struct request *r) {
    char body[1024] = "", extra[256] = "", text[2048];
    const char *status = "200 OK", *query = strchr(r->target, '?');
    if (!query) query = "";
    if (!strcmp(r->method, "POST") && strstr(query, "uploads"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>key</Key>"
                                    "<UploadId>upload-1</UploadId></InitiateMultipartUploadResult>");
    else if (!strcmp(r->method, "POST") && strstr(query, "uploadId"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><CompleteMultipartUploadResult><Location>x</Location><Bucket>bucket</Bucket>"
                                    "<Key>key</Key><ETag>&quot;d41d8cd98f00b204e9800998ecf8427e-1&quot;</ETag></CompleteMultipartUploadResult>");
    else if (!strcmp(r->method, "POST"))
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><DeleteResult></DeleteResult>");
    else if (!strcmp(r->method, "GET") && !strcmp(r->target, "/__stats"))
        snprintf(body, sizeof body, "{\"requests\": %lu, \"bytes\": %lu}\n", requests, body_bytes);
    else if (!strcmp(r->method, "GET") && *query)
        snprintf(body, sizeof body, "<?xml version=\"1.0\"?><ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount>"
                                    "<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>");
    else if (!strcmp(r->method, "GET") || !strcmp(r->method, "HEAD"))
        status = "404 Not Found";
    else if (!strcmp(r->method, "DELETE"))
        status = "204 No Content";
    if (*r->checksum) snprintf(extra, sizeof extra, "x-amz-checksum-crc32c: %s\r\n", r->checksum);
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 %s\r\nServer: sink\r\nContent-Length: %zu\r\nContent-Type: application/xml\r\n"
                     "ETag: \"d41d8cd98f00b204e9800998ecf8427e\"\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n"
                     "x-amz-request-id: 1\r\n%s\r\n%s",
                     status, strlen(body), extra, body);
    return say(s->fd, text, (size_t)n);
}

static void *serve(void *argument) {
    struct stream *s = argument;
    struct request r;
    while (read_head(s, &r)) {
        if (r.expects_continue && !say(s->fd, "HTTP/1.1 100 Continue\r\n\r\n", 25)) break;
        if (r.chunked ? !drop_chunked(s, &r.length) : !drop(s, r.length)) break;
        if (strcmp(r.target, "/__stats")) {
            __atomic_fetch_add(&requests, 1, __ATOMIC_RELAXED);
            __atomic_fetch_add(&body_bytes, r.length, __ATOMIC_RELAXED);
        }
        if (!answer(s, &r)) break;
    }
    close(s->fd);
    free(s);
    return NULL;
}

int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 0))};
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
